"""One module for each program: `fedftg NAME`.

A module has `main`, and ARGUMENT, what it takes besides flags, if anything.
"""

NAMES = {
    'train': 'Trains one federated model and writes metrics, pictures and parameters.',
    'compare': 'Compares methods over several seeds, on equal partitions and schedules.',
    'sweep': 'Trains all combinations of flag values, or a list of them, and sorts them.',
    'ablation': 'When does FedFTG help? One factor at a time around a centre, paired by seed.',
    'partition': 'Draws a partition and says how unequal it is, before anything is trained.',
    'report': 'Makes report.html of a run, comparison or sweep, from the files in its folder.',
    'benchmark': 'Times a round of ours and of what one would pick instead, side by side.',
}
