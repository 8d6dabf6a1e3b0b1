"""The comparison suite: ``python -m reweigh.benchmarks run digits_lt50``.

``suites`` says what is compared, ``runner`` trains it on all cores and can be stopped and continued, ``statistics``
holds the paired tests, ``report`` turns the runs of a folder into a table, ``results.json`` and ``report.html``.
"""
