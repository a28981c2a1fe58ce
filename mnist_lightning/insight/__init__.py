"""What a trained network learned, and where it fails: pictures and measurements."""
