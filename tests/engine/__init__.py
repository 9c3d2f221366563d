"""The engine, taken through runs in this process: real SQL, real tools, a scripted model."""
