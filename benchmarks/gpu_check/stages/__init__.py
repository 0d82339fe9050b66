"""What the check finds out, a module a stage, each with `run(context)`."""
