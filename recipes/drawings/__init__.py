"""The recipe that makes the text-to-image base model of drawings with faces, at 128 x 128 pixels."""
