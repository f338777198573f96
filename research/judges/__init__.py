"""Judges of the small bases' pictures: classifier, rules that read pixels, and scores that know the true drawing."""
