"""The library inside the engines that people use. None is imported before it is asked for."""
