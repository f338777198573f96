"""How the two small encoders were trained that the studies on the small base are judged by."""
