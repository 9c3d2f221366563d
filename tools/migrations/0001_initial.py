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
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='Pause',
            fields=[
                ('key', models.CharField(max_length=300, primary_key=True, serialize=False)),
                ('until', models.DateTimeField()),
                ('reason', models.CharField(blank=True, default='', max_length=200)),
            ],
        ),
        migrations.CreateModel(
            name='RateUse',
            fields=[
                ('id', models.BigAutoField(primary_key=True, serialize=False)),
                ('key', models.CharField(max_length=300)),
                ('at', models.DateTimeField()),
                ('amount', models.BigIntegerField(db_default=1, default=1)),
            ],
            options={
                'indexes': [models.Index(fields=['key', 'at'], name='longhaul_rate_used')],
            },
        ),
        migrations.CreateModel(
            name='ToolCall',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('run_id', models.UUIDField()),
                ('message_id', models.UUIDField()),
                ('step', models.IntegerField()),
                ('index', models.IntegerField()),
                ('name', models.CharField(max_length=200)),
                ('arguments', models.JSONField(default=dict)),
                ('status', models.CharField(choices=[('requested', 'Requested'), ('awaiting_approval', 'Awaiting Approval'), ('running', 'Running'), ('retrying', 'Retrying'), ('awaiting_result', 'Awaiting Result'), ('awaiting_child', 'Awaiting Child'), ('unknown', 'Unknown'), ('settled', 'Settled')], default='requested', max_length=20)),
                ('outcome', models.CharField(blank=True, choices=[('success', 'Success'), ('failed', 'Failed'), ('denied', 'Denied'), ('cancelled', 'Cancelled')], default='', max_length=16)),
                ('result', models.JSONField(null=True)),
                ('stored', models.JSONField(null=True)),
                ('error', models.JSONField(null=True)),
                ('attempt', models.IntegerField(default=1)),
                ('max_attempts', models.IntegerField(default=1)),
                ('idempotency_key', models.CharField(max_length=100)),
                ('idempotent', models.BooleanField(null=True)),
                ('atomic', models.BooleanField(default=False)),
                ('on_unknown', models.CharField(db_default='ask', default='ask', max_length=10)),
                ('deferred', models.BooleanField(default=False)),
                ('timeout', models.DurationField()),
                ('queue', models.CharField(blank=True, default='', max_length=200)),
                ('holder', models.UUIDField(null=True)),
                ('claimed_at', models.DateTimeField(null=True)),
                ('timeout_at', models.DateTimeField(null=True)),
                ('not_before', models.DateTimeField(null=True)),
                ('next_publish_at', models.DateTimeField(null=True)),
                ('publishes', models.IntegerField(default=0)),
                ('gates', models.JSONField(null=True)),
                ('priority', models.SmallIntegerField(db_default=0, default=0)),
                ('turn_of', models.CharField(blank=True, db_default='', default='', max_length=100)),
                ('lane', models.CharField(blank=True, db_collation='C', db_default='', default='', max_length=1000)),
                ('turn', models.BigIntegerField(null=True)),
                ('deadline', models.DateTimeField(null=True)),
                ('progress', models.JSONField(null=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('settled_at', models.DateTimeField(null=True)),
                ('assignee', models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='longhaul_assigned_calls', to=settings.AUTH_USER_MODEL)),
            ],
        ),
        migrations.CreateModel(
            name='ToolAttempt',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('number', models.IntegerField()),
                ('worker_id', models.UUIDField()),
                ('worker', models.CharField(blank=True, db_default='', default='', max_length=200)),
                ('task_id', models.CharField(blank=True, default='', max_length=100)),
                ('started_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('ended_at', models.DateTimeField(null=True)),
                ('outcome', models.CharField(blank=True, default='', max_length=20)),
                ('error', models.JSONField(null=True)),
                ('retry_at', models.DateTimeField(null=True)),
                ('backend_pid', models.IntegerField(null=True)),
                ('call', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='attempts', to='longhaul_tools.toolcall')),
            ],
        ),
        migrations.CreateModel(
            name='StoredContent',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('number', models.IntegerField()),
                ('name', models.CharField(max_length=200)),
                ('content_type', models.CharField(max_length=200)),
                ('size', models.BigIntegerField()),
                ('content', models.BinaryField()),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('call', models.ForeignKey(db_constraint=False, db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='contents', to='longhaul_tools.toolcall')),
            ],
        ),
        migrations.CreateModel(
            name='Approval',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('approved', models.BooleanField(null=True)),
                ('note', models.TextField(blank=True, default='')),
                ('arguments', models.JSONField(null=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('decided_at', models.DateTimeField(null=True)),
                ('decided_by', models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='longhaul_approvals', to=settings.AUTH_USER_MODEL)),
                ('call', models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, related_name='approval', to='longhaul_tools.toolcall')),
            ],
        ),
        migrations.CreateModel(
            name='Worker',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=200)),
                ('kind', models.CharField(max_length=16)),
                ('host', models.CharField(max_length=200)),
                ('pid', models.IntegerField()),
                ('lock_key', models.BigIntegerField(null=True, unique=True)),
                ('started_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('beat_at', models.DateTimeField(db_default=threads.clock.Now())),
                ('draining', models.BooleanField(default=False)),
                ('gone_at', models.DateTimeField(null=True)),
                ('parent', models.ForeignKey(db_constraint=False, null=True, on_delete=django.db.models.deletion.CASCADE, related_name='children', to='longhaul_tools.worker')),
            ],
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=models.Index(condition=models.Q(('status__in', ['requested', 'retrying'])), fields=['next_publish_at'], name='longhaul_call_due'),
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=models.Index(condition=models.Q(('turn__isnull', False)), fields=['lane', '-priority', 'turn', 'id'], name='longhaul_call_in_lane'),
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=models.Index(condition=models.Q(('turn__isnull', False)), fields=['turn_of', 'lane', 'priority', '-turn'], name='longhaul_call_turn_of'),
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=threads.indexes.Gin(condition=models.Q(('gates__isnull', False), ('status__in', ['requested', 'retrying', 'running']), ('turn__isnull', True)), fields=['gates'], name='longhaul_call_gated'),
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=models.Index(condition=models.Q(('status', 'running')), fields=['holder'], name='longhaul_call_held'),
        ),
        migrations.AddIndex(
            model_name='toolcall',
            index=models.Index(condition=models.Q(('status__in', ['awaiting_approval', 'awaiting_result', 'unknown'])), fields=['id'], name='longhaul_call_needs_a_person'),
        ),
        migrations.AddConstraint(
            model_name='toolcall',
            constraint=models.UniqueConstraint(fields=('run_id', 'step', 'index'), name='longhaul_one_call_a_place'),
        ),
        migrations.AddConstraint(
            model_name='toolcall',
            constraint=models.CheckConstraint(condition=models.Q(('status', 'settled'), ('outcome', ''), _connector='XOR'), name='longhaul_a_settled_call_has_an_outcome'),
        ),
        migrations.AddConstraint(
            model_name='toolcall',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('holder__isnull', False), ('status', 'running')), models.Q(('status', 'running'), _negated=True), _connector='OR'), name='longhaul_a_running_call_has_a_holder'),
        ),
        migrations.AddConstraint(
            model_name='toolcall',
            constraint=models.CheckConstraint(condition=models.Q(('atomic', True), ('idempotent__isnull', False), _negated=True), name='longhaul_atomic_excludes_idempotent'),
        ),
        migrations.AddConstraint(
            model_name='toolattempt',
            constraint=models.UniqueConstraint(fields=('call', 'number'), name='longhaul_one_claim_an_attempt'),
        ),
        migrations.AddConstraint(
            model_name='storedcontent',
            constraint=models.UniqueConstraint(fields=('call', 'number'), name='longhaul_one_content_a_number'),
        ),
        migrations.AddIndex(
            model_name='worker',
            index=models.Index(condition=models.Q(('gone_at__isnull', True)), fields=['beat_at'], name='longhaul_worker_present'),
        ),
        migrations.RunSQL((SQL / "0000_storage.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0001_calls.sql").read_text(), migrations.RunSQL.noop),
        migrations.RunSQL((SQL / "0002_gates.sql").read_text(), migrations.RunSQL.noop),
    ]
