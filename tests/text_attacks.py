"""Texts that a careless page would run, swallow or break on."""

from __future__ import annotations

ATTACKS = [
    "<bos>",
    "<|endoftext|>",
    "</script>",
    "</script><script>document.title='PWNED'</script>",
    "<!--<script>",
    "]]>",
    "<img src=x onerror=\"document.title='PWNED'\">",
    "<svg/onload=document.title='PWNED'>",
    "javascript:document.title='PWNED'",
    "{{ 7 * 7 }}{% raw %}",
    "\"';`${1+1}",
    "&lt;b&gt; &amp; &",
    "\n",
    "\r\n\t",
    "   ",
    "",
    "\x00\x07\x1b[31m\x7f\x85",
    "\u2028\u2029",
    "\u200b\ufeff\u00ad",
    "\u202egnp.exe",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f4bb\U0001f680",
    "\ud83d",
    "\udc80abc",
    "=1+1",
    "$\\frac{1}{0}$",
    "x" * 400,
]
