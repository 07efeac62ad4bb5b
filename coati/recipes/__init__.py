"""From flags to a run: one module an algorithm, and the parts that they share."""

from coati.parallel.compat.import_colossalai import silence_known_noise

silence_known_noise()  # peft, too, logs some of it when it is imported
