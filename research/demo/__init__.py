"""The demo: a small base model learns a subject it has never seen, end to end, on any machine."""
