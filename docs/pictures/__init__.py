"""The pictures of the tutorial, and the script that draws them."""
