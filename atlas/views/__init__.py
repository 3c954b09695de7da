"""Pictures of circuits: self-contained HTML pages, and SVG and PNG files drawn by them."""
