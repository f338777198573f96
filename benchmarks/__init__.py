"""Measurements that the documentation quotes. Each module writes its own table."""
