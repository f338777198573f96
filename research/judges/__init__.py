"""Judges of the small base's pictures: a classifier, and rules that read pixels."""
