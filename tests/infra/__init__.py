"""Tests of infra/ and of the commands that render it and look after it."""
