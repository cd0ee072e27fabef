"""Chat templates: messages to the text that a model was trained on, rendered in a process of their own."""

from serving.chat.template import ChatTemplate, RendererBusyError, TemplateError, chat_template

__all__ = ["ChatTemplate", "RendererBusyError", "TemplateError", "chat_template"]
