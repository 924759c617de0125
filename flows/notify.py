"""Tell someone when a run fails: an automation of Prefect's that posts to the webhook $CUVEE_NOTIFY_URL.

The body is {"text": ...}, which Slack, Mattermost, Rocket.Chat and Google Chat take. Prefect keeps the address in an
encrypted block.
"""

from __future__ import annotations

NAME = "cuvee-run-failed"
TEXT = ("{{ flow_run.name }} of {{ deployment.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message }}\n"
        "{{ flow_run | ui_url }}\nRetry goes on from what is made already.")


def register(url: str) -> None:
    """Create or replace the automation at the server of PREFECT_API_URL."""
    from prefect.automations import Automation, EventTrigger, Posture
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.events.actions import SendNotification

    block = CustomWebhookNotificationBlock(name=NAME, url="{{url}}", json_data={"text": "{{body}}"}, secrets={"url": url})
    block_id = block.save(NAME, overwrite=True)
    automation = Automation(
        name=NAME, description="Posts to the team's webhook when a run of Cuvee fails or its process dies.", tags=["cuvee"],
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "cuvee"}, posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[SendNotification(block_document_id=block_id, subject="Cuvee: a run failed", body=TEXT)],
    )  # fmt: skip
    try:
        automation.id = Automation.read(name=NAME).id
        automation.update()
    except ValueError:  # there is none
        automation.create()
