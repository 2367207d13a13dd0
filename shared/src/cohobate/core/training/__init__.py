"""Schedules, resumable data order, callbacks and stages around Lightning's loop."""
