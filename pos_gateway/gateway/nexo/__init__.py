"""The POS interface: nexo Retailer Protocol 3.0 as JSON, the dialect that POS software speaks to a terminal.

    server ─► crypto ─► messages ─► desk ─► payments … lane … journal
                                     │ ▲
                                     ▼ │
                                    store      what was asked, and what was answered, for 48 hours

`transitions` holds the one table of what may become of a request.
"""
