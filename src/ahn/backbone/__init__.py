"""What the library knows of the host model: its layers, its rotary positions, its linear maps, its version."""
