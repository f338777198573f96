"""What a picture of the small base shows: judged by a classifier, and by looking at pixels."""
