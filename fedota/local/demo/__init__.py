"""The main job from beginning to end, with real parts: what `fedota demo` plays."""
