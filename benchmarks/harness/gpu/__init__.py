"""The steps of the study ``gpu``, each a process of its own: ``python -m benchmarks.harness.gpu STEP``.

``machine`` says what is there; ``checks`` runs the tests, alone and under compute-sanitizer; ``updates`` and
``whole_steps`` measure; ``training`` trains; ``report`` writes the page. ``pack`` makes the file of images that is
carried to the machine. Nothing here needs more than torch, numpy, triton and pytest.
"""
