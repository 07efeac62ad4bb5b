"""Environments that answer calls of tools and end with the first response without one."""

from abc import abstractmethod
from typing import Any

from coati.environments.multi_turn import Environment, Message, Row, Turn
from coati.rewards.answers import final_answer, same_answer


class ToolError(Exception):
    """A call that cannot be answered, in words for the policy."""


def schema(name: str, about: str, **arguments: str) -> dict[str, Any]:
    """The schema of a function whose ``arguments``, by what they are, are required texts."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": about,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "string", "description": text} for key, text in arguments.items()
                },
                "required": list(arguments),
            },
        },
    }


class ToolEnvironment(Environment):
    """Answers each call by :meth:`call`. The reward is :meth:`score` of the response that calls
    nothing: 1 for the row's ``gt_answer``, else 0."""

    def reset(self, row: Row) -> list[Message]:
        self.row = row
        return row["messages"]

    def step(self, response: Message) -> Turn:
        calls = response.get("tool_calls")
        if not calls:
            return Turn(reward=self.score(response), done=True)
        return Turn([self._result(call) for call in calls])

    @abstractmethod
    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What the tool says. Raises ToolError for a call that the policy should not have made so;
        its arguments are those of the schema."""

    def score(self, response: Message) -> float:
        """Of the last response."""
        truth = self.row.get("gt_answer")
        answer = final_answer(response["content"])
        if truth is None or answer is None:
            return 0.0
        return float(same_answer(answer, str(truth).rpartition("####")[2]))

    def _result(self, call: dict[str, Any]) -> Message:
        name = call["function"]["name"]
        try:
            content = self.call(name, self._checked(name, call["function"]["arguments"]))
        except ToolError as error:
            self.failed_calls += 1
            content = f"error: {error}"
        given = {"tool_call_id": call["id"]} if call.get("id") else {}
        return {"role": "tool", "name": name, "content": content, **given}

    def _checked(self, name: str, arguments: Any) -> dict[str, Any]:
        """Raises ToolError for an unknown function, and arguments that are not those of its
        schema."""
        functions = {tool["function"]["name"]: tool["function"] for tool in self.tools}
        if name not in functions:
            raise ToolError(f"there is no tool {name}; there is {', '.join(functions)}")
        wanted = functions[name].get("parameters", {})
        known = wanted.get("properties", {})
        if not isinstance(arguments, dict):
            raise ToolError(f"the arguments of {name} are no object")
        if missing := [key for key in wanted.get("required", ()) if key not in arguments]:
            raise ToolError(f"{name} needs {', '.join(missing)}")
        if unknown := [key for key in arguments if key not in known]:
            takes = ", ".join(known)
            raise ToolError(f"{name} takes no {', '.join(map(str, unknown))}; it takes {takes}")
        return arguments
