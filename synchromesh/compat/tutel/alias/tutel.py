"""Where this folder is in the search path, `import tutel` gives synchromesh's: for processes that a script spawns."""

from synchromesh.compat.tutel import install

install()
