"""How other programs name the layers of models."""
