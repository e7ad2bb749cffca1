"""Compiled kernels on disk: one folder for each GPU architecture, one entry for each key, checked on every load.

    <folder>/sm_90a/<key>/            an entry: the artefact and manifest.json
    <folder>/sm_90a/locks/<key>.lock  held by the process that compiles
    <folder>/sm_90a/build/<key>-*/    its build folder, which no other process reads
    <folder>/sm_90a/failed/<key>/     sources and log of a failed compile

An entry is written in the build folder, checked and moved to its place by one rename. The operating system drops the
lock when its process ends, however it ends. The next compile of a key removes what a killed process left in ``build``.
"""
