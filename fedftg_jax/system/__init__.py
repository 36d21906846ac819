"""What any program needs: its start and end, files, devices, the screen."""
