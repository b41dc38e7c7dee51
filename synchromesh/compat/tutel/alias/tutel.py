"""With this folder in the search path, `import tutel` gives synchromesh's: so do processes find it that a script spawns."""

from synchromesh.compat.tutel import install

install()
