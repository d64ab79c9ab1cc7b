"""`residrop evaluate --uncertainty`: what is measured, its tables, pictures and page."""
