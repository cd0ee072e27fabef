"""Requests and their timestamps: schedules, events, clocks."""
