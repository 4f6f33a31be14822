#!/usr/bin/env python3
"""Prints the numbers of tests/server/rules/power_test.cc: powers to 80 digits, rounded once."""

import struct
from decimal import Decimal, getcontext

getcontext().prec = 80
LOG_096 = Decimal(0.96).ln()  # of the double


def bits(value):
    return struct.unpack('<Q', struct.pack('<d', float(value)))[0]


def fold(powers):
    total = 0
    for power in powers:
        total = (total * 31 + bits(power)) % 2**64
    return hex(total)


for base in 0.9, 0.95, 0.99, 0.999, 0.9999:
    print(base, fold(Decimal(base)**t for t in range(1, 5001)))
print(0.96, fold((Decimal(t * 0.004) * LOG_096).exp() for t in range(1, 5001)))
for base, exponent in (0.9999, 494), (0.9999999, 2_000_000_000):
    print(base, exponent, float(Decimal(base)**exponent).hex())
for exponent in 2.068, 4000.0:
    print(0.96, exponent, float((Decimal(exponent) * LOG_096).exp()).hex())
