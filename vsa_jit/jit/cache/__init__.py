"""Compiled kernels on disk: one folder for each GPU architecture, one entry for each key, checked on every load.

    <folder>/sm_90a/<key>/            an entry: the artefact and manifest.json
    <folder>/sm_90a/locks/<key>.lock  held by the process that compiles
    <folder>/sm_90a/build/<key>-*/    its private files
    <folder>/sm_90a/failed/<key>/     what is needed to see why a compile failed

An entry is made in the private folder, checked and moved to its place by one rename. The lock is the operating
system's and dies with its process. What a killed process leaves in ``build`` nobody reads, and the next compile of the
key removes it.
"""
