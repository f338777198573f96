"""The paper's experiments, the methods it compares, the demo, and the judges of the small base. Not in the wheel."""
