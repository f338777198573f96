"""Our experiments for PEFT's image benchmark, `method_comparison/image-gen` of its repository, and their runs."""
