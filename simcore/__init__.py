"""What is run: models, workloads, strategies, schedules, programs, the event engine, timelines."""
