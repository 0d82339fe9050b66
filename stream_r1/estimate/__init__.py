"""What a run costs before it is run: work counted from the models' own code, time from datasheets."""
