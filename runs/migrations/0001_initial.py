from pathlib import Path

import django.db.models.deletion
import threads.clock
import threads.ids
import threads.indexes
from django.conf import settings
from django.db import migrations, models


SQL = Path(__file__).parents[1] / "sql"


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        ('longhaul_threads', '0001_initial'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='Leave',
            fields=[
                ('run_id', models.UUIDField(primary_key=True, serialize=False)),
                ('key', models.CharField(max_length=300)),
                ('priority', models.SmallIntegerField()),
                ('turn_of', models.CharField(max_length=100)),
                ('turn', models.BigIntegerField()),
                ('since', models.DateTimeField()),
                ('released_at', models.DateTimeField(null=True)),
                ('limits', models.JSONField(null=True)),
                ('tokens', models.BigIntegerField(default=0)),
                ('reason', models.CharField(blank=True, default='', max_length=200)),
                ('message_id', models.UUIDField(null=True)),
                ('use_id', models.BigIntegerField(null=True)),
            ],
            options={
                'indexes': [models.Index(condition=models.Q(('message_id__isnull', True)), fields=['key', '-priority', 'turn', 'run_id'], name='longhaul_leave_in_line'), models.Index(condition=models.Q(('message_id__isnull', False)), fields=['key'], name='longhaul_leave_asked'), models.Index(condition=models.Q(('message_id__isnull', False)), fields=['since'], name='longhaul_leave_old')],
            },
        ),
        migrations.CreateModel(
            name='Run',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('agent', models.CharField(max_length=200)),
                ('status', models.CharField(choices=[('held', 'Held'), ('queued', 'Queued'), ('running', 'Running'), ('waiting', 'Waiting'), ('requires_action', 'Requires Action'), ('completed', 'Completed'), ('failed', 'Failed'), ('cancelled', 'Cancelled')], default='queued', max_length=16)),
                ('stop_reason', models.CharField(blank=True, choices=[('end_turn', 'End Turn'), ('max_steps', 'Max Steps'), ('token_budget', 'Token Budget'), ('cost_budget', 'Cost Budget'), ('deadline', 'Deadline'), ('model_error', 'Model Error'), ('poison', 'Poison'), ('tool_unknown', 'Tool Unknown'), ('configuration', 'Configuration'), ('cancelled', 'Cancelled'), ('interrupted', 'Interrupted'), ('rolled_back', 'Rolled Back'), ('thread_deleted', 'Thread Deleted'), ('parent_ended', 'Parent Ended')], default='', max_length=16)),
                ('origin', models.CharField(default='start', max_length=16)),
                ('parent_call_id', models.UUIDField(null=True)),
                ('depth', models.SmallIntegerField(default=0)),
                ('busy', models.CharField(default='enqueue', max_length=16)),
                ('priority', models.SmallIntegerField(default=0)),
                ('overrides', models.JSONField(blank=True, default=dict)),
                ('save_mode', models.CharField(default='prompt_and_output', max_length=20)),
                ('metadata', models.JSONField(blank=True, default=dict)),
                ('input_message_id', models.UUIDField(null=True)),
                ('idempotency_key', models.CharField(max_length=200, null=True)),
                ('fingerprint', models.CharField(blank=True, default='', max_length=64)),
                ('epoch', models.IntegerField(default=0)),
                ('holder', models.UUIDField(null=True)),
                ('dispatch_seq', models.IntegerField(default=0)),
                ('pending_message_id', models.UUIDField(null=True)),
                ('pending_ordinal', models.IntegerField(db_default=0, default=0)),
                ('leg_deadline', models.DateTimeField(null=True)),
                ('linger_until', models.DateTimeField(null=True)),
                ('not_before', models.DateTimeField(null=True)),
                ('next_publish_at', models.DateTimeField(null=True)),
                ('publishes', models.IntegerField(default=0)),
                ('gates', models.JSONField(null=True)),
                ('lane', models.CharField(blank=True, db_default='', default='', max_length=1000)),
                ('turn', models.BigIntegerField(null=True)),
                ('max_dispatched', models.IntegerField(db_default=100, default=100)),
                ('last_seq', models.BigIntegerField(default=0)),
                ('events_removed_through', models.BigIntegerField(db_default=0, default=0)),
                ('compacted_at', models.DateTimeField(null=True)),
                ('steps', models.IntegerField(default=0)),
                ('legs', models.IntegerField(default=0)),
                ('lost', models.IntegerField(default=0)),
                ('bad_calls', models.IntegerField(default=0)),
                ('model_tries', models.IntegerField(default=0)),
                ('retry_since', models.DateTimeField(null=True)),
                ('input_tokens', models.BigIntegerField(default=0)),
                ('output_tokens', models.BigIntegerField(default=0)),
                ('cost', models.DecimalField(decimal_places=9, default=0, max_digits=18)),
                ('output', models.JSONField(null=True)),
                ('error', models.JSONField(null=True)),
                ('deadline', models.DateTimeField(null=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('entered_at', models.DateTimeField(db_default=threads.clock.Now(), null=True)),
                ('queued_at', models.DateTimeField(null=True)),
                ('started_at', models.DateTimeField(null=True)),
                ('finished_at', models.DateTimeField(null=True)),
                ('owner', models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.CASCADE, related_name='longhaul_runs', to=settings.AUTH_USER_MODEL)),
                ('parent', models.ForeignKey(db_index=False, null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='children', to='longhaul_runs.run')),
                ('thread', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='runs', to='longhaul_threads.thread')),
            ],
            options={
                'permissions': [('cancel_run', 'Can cancel run')],
            },
        ),
        migrations.CreateModel(
            name='Leg',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('number', models.IntegerField()),
                ('epoch', models.IntegerField()),
                ('worker_id', models.UUIDField()),
                ('worker', models.CharField(max_length=200)),
                ('task_id', models.CharField(blank=True, default='', max_length=100)),
                ('started_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('ended_at', models.DateTimeField(null=True)),
                ('reason', models.CharField(blank=True, default='', max_length=16)),
                ('run', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='leg_set', to='longhaul_runs.run')),
            ],
        ),
        migrations.CreateModel(
            name='Event',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('seq', models.BigIntegerField()),
                ('type', models.CharField(max_length=40)),
                ('at', models.DateTimeField()),
                ('epoch', models.IntegerField(null=True)),
                ('message_id', models.UUIDField(null=True)),
                ('ordinal', models.IntegerField(null=True)),
                ('payload', models.JSONField(default=dict)),
                ('run', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='event_set', to='longhaul_runs.run')),
            ],
        ),
        migrations.CreateModel(
            name='Step',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('number', models.IntegerField()),
                ('leg_id', models.UUIDField()),
                ('epoch', models.IntegerField()),
                ('message_id', models.UUIDField()),
                ('model', models.CharField(max_length=200)),
                ('instructions', models.TextField(blank=True, default='')),
                ('tool_names', models.JSONField(default=list)),
                ('schema_digest', models.CharField(blank=True, default='', max_length=64)),
                ('options', models.TextField(default='{}')),
                ('context', models.JSONField(default=dict)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('run', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='step_set', to='longhaul_runs.run')),
            ],
        ),
        migrations.CreateModel(
            name='Usage',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('step', models.IntegerField()),
                ('epoch', models.IntegerField()),
                ('message_id', models.UUIDField()),
                ('model', models.CharField(max_length=200)),
                ('input_tokens', models.BigIntegerField(default=0)),
                ('output_tokens', models.BigIntegerField(default=0)),
                ('cached_tokens', models.BigIntegerField(default=0)),
                ('reasoning_tokens', models.BigIntegerField(default=0)),
                ('cost', models.DecimalField(decimal_places=9, max_digits=18, null=True)),
                ('discarded', models.BooleanField(default=False)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('run', models.ForeignKey(db_constraint=False, on_delete=django.db.models.deletion.CASCADE, related_name='usage_set', to='longhaul_runs.run')),
            ],
            options={
                'verbose_name_plural': 'usage',
            },
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(fields=['owner', 'id'], name='longhaul_run_of_owner'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(fields=['thread', 'id'], name='longhaul_run_of_thread'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(fields=['thread', 'entered_at', 'id'], name='longhaul_run_in_thread'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('parent__isnull', False)), fields=['parent'], name='longhaul_run_of_parent'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('status__in', ['failed', 'cancelled'])), fields=['status', 'id'], name='longhaul_run_not_completed'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('status', 'queued')), fields=['next_publish_at'], name='longhaul_run_due'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('status', 'running')), fields=['holder'], name='longhaul_run_running'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('turn__isnull', False)), fields=['lane', '-priority', 'turn', 'id'], name='longhaul_run_in_lane'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('turn__isnull', False)), fields=['lane', 'owner', 'priority', 'turn'], name='longhaul_run_turn_of_owner'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=threads.indexes.Gin(condition=models.Q(('gates__isnull', False), ('status__in', ['queued', 'running', 'waiting', 'requires_action'])), fields=['gates'], name='longhaul_run_gated'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('finished_at__isnull', False), models.Q(('events_removed_through', 0), ('events_removed_through__gte', 100000), _connector='OR')), fields=['finished_at'], name='longhaul_run_with_log'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('compacted_at__isnull', True), ('finished_at__isnull', False)), fields=['finished_at'], name='longhaul_run_to_compact'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('status', 'held')), fields=['thread', 'id'], name='longhaul_run_held'),
        ),
        migrations.AddIndex(
            model_name='run',
            index=models.Index(condition=models.Q(('deadline__isnull', False), ('status__in', ['held', 'queued', 'running', 'waiting', 'requires_action'])), fields=['deadline'], name='longhaul_run_deadline'),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.UniqueConstraint(condition=models.Q(('status__in', ['queued', 'running', 'waiting', 'requires_action'])), fields=('thread',), name='longhaul_one_run_occupies_a_thread'),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.UniqueConstraint(condition=models.Q(('idempotency_key__isnull', False)), fields=('owner', 'idempotency_key'), name='longhaul_one_run_an_idempotency_key', nulls_distinct=False),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.UniqueConstraint(condition=models.Q(('parent_call_id__isnull', False)), fields=('parent_call_id',), name='longhaul_one_child_a_call'),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('holder__isnull', False), ('status', 'running')), models.Q(models.Q(('status', 'running'), _negated=True), ('holder__isnull', True)), _connector='OR'), name='longhaul_only_a_running_run_has_a_holder'),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.CheckConstraint(condition=models.Q(('status', 'running'), ('pending_message_id__isnull', True), _connector='OR'), name='longhaul_only_a_running_run_has_a_pending_message'),
        ),
        migrations.AddConstraint(
            model_name='run',
            constraint=models.CheckConstraint(condition=models.Q(('status__in', ['completed', 'failed', 'cancelled']), ('stop_reason', ''), _connector='XOR'), name='longhaul_an_ended_run_has_a_stop_reason'),
        ),
        migrations.AddConstraint(
            model_name='leg',
            constraint=models.UniqueConstraint(fields=('run', 'number'), name='longhaul_legs_are_a_chain'),
        ),
        migrations.AddConstraint(
            model_name='leg',
            constraint=models.UniqueConstraint(condition=models.Q(('ended_at__isnull', True)), fields=('run',), name='longhaul_one_open_leg_a_run'),
        ),
        migrations.AddConstraint(
            model_name='event',
            constraint=models.UniqueConstraint(fields=('run', 'seq'), name='longhaul_one_event_a_seq'),
        ),
        migrations.AddConstraint(
            model_name='step',
            constraint=models.UniqueConstraint(fields=('run', 'number'), name='longhaul_one_commit_a_step'),
        ),
        migrations.RunSQL((SQL / "0000_storage.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0001_log.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0002_legs.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0003_deltas.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0004_compaction.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0005_models.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0006_turns.sql").read_text(), migrations.RunSQL.noop),
    ]
