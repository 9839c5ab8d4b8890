"""Optimizers and learning-rate schedules; schedules are pure functions of the step."""
