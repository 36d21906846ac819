"""Parts that any program needs: start and end, files, devices, the screen."""
