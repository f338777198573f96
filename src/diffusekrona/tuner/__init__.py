"""The PEFT tuner: config, layer, model; which layers it targets, and updates merged into weights."""
