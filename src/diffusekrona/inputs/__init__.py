"""What people give: pictures, their captions, and text files as editors leave them."""
