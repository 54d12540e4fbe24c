"""Quantizers: a network with fewer bits, which can be taken off again exactly.

    quantize(network, method, calls)    restore(network)    save(network, folder)    load(network, folder)

    quantization.py   Quantizer (a method), Quantization (what it does to a network), quantize, restore, sizes
    storage.py        save and load: safetensors and JSON
    report.py         bits, weight errors, activation ranges and errors of every layer: JSON, CSV, a picture
    training.py       quantization-aware training, and fine-tuning to a teacher

    methods/          each a `Quantizer`: how weights and inputs are quantized, and with which numbers
      registry.py       the methods by name
      minmax.py         min-max at any bits, weights and activations; AdaRound (adaround.py) as an option
      hqq.py            half-quadratic quantization: weights at 4, 3, 2 bits without calibration
      torchao.py        int8 and float8 Linear layers by torchao's kernels
      tdq.py            activation scales predicted from the timestep, learned weights; frozen to tables
      tinydm.py         channel balancing and folding (balancing.py), time-grouped activations (time_groups.py),
                        quantized attention
      vqdm.py           weights as sums of codebook vectors, chosen for the error of the output

    layers/           what stands in the network then, and what is stored of it
      plan.py           which layers are quantized, which are not, and why
      quantized_layer.py  QuantizedLayer = operation + weight + quantizer of the input; layers split by input channels
      weights.py, codebooks.py   where a weight is kept
      activations.py    what is done to an input
      attention.py      what is done to queries, keys, values, logits and probabilities
      correction.py     what is done to the network's answer (PTQD)
      timestep.py       the timestep that the network is being told, for what depends on it
      affine.py         codes, scales, zeros; fake quantization, straight-through and LSQ gradients; groups of weights
      packing.py        codes of b bits in bytes and back

    calibration/      what the numbers are chosen by
      collect.py        calibration sets: calls of the network along the sampling trajectory
      layer_inputs.py   what the layers receive on one: ranges by time, some values, second moments
      ranges.py         min-max, percentile and least-error ranges
      output.py         the numbers of PTQD's correction

Methods use calibration, and both of them layers. A method's `apply(to, calls)` puts a `QuantizedLayer` in the place of
each of `to.layers()` through `to.replace`. What it keeps or does anew is a `Part`, so that saving, sizes and reports
know it. Quantization is simulated (levels of b bits, real arithmetic) unless a method says that integers are computed
with.
"""
