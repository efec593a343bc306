"""What can be typed after `saltflat`, each a function that checks its arguments and returns the job to do."""
