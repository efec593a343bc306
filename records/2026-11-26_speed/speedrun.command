saltflat train speedrun-digits --threads 1 
