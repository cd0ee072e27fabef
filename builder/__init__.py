"""From text to a bundle: the only part of the project that trains or exports."""
