"""How a training steps, stops, freezes layers and shows where it is."""
