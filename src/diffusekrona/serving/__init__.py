"""Many adapters at once on one base."""
