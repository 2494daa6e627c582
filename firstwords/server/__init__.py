"""A trained model as a server: an API that speaks OpenAI's words, and a page to chat on.

    curl 127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}'

`guard` turns away what may not ask, `protocol` reads requests and writes answers, `batching` decodes
those of all clients together, `api` joins the three, `page` is what a browser shows, and `serving` opens
the port. Invariant: the reply to a request is the one that `ChatSession.ask` gives to the same messages,
whoever else is asking, but for what `generate` says about rounding.
"""
