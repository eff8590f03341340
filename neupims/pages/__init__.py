"""Results as HTML pages, SVG charts and Perfetto traces."""
