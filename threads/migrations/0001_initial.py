from pathlib import Path

import django.db.models.deletion
import threads.clock
import threads.ids
from django.conf import settings
from django.db import migrations, models


SQL = Path(__file__).parents[1] / "sql"


class Migration(migrations.Migration):

    initial = True

    dependencies = [
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.RunSQL((SQL / "0001_clock.sql").read_text(), migrations.RunSQL.noop),
        migrations.CreateModel(
            name='Clock',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('ahead', models.DurationField()),
            ],
            options={
                'verbose_name_plural': 'clock',
            },
        ),
        migrations.CreateModel(
            name='ApiKey',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(blank=True, default='', max_length=200)),
                ('prefix', models.CharField(max_length=16)),
                ('digest', models.CharField(max_length=64, unique=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('expires_at', models.DateTimeField(blank=True, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('last_used_at', models.DateTimeField(blank=True, null=True)),
                ('owner', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='longhaul_api_keys', to=settings.AUTH_USER_MODEL)),
            ],
            options={
                'verbose_name': 'API key',
            },
        ),
        migrations.CreateModel(
            name='Thread',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('agent', models.CharField(blank=True, default='', max_length=200)),
                ('title', models.CharField(blank=True, default='', max_length=500)),
                ('summary', models.TextField(blank=True, default='')),
                ('metadata', models.JSONField(blank=True, default=dict)),
                ('overrides', models.JSONField(blank=True, default=dict)),
                ('archived_at', models.DateTimeField(blank=True, null=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('owner', models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.CASCADE, related_name='longhaul_threads', to=settings.AUTH_USER_MODEL)),
            ],
        ),
        migrations.CreateModel(
            name='Message',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('run_id', models.UUIDField(blank=True, null=True)),
                ('step', models.IntegerField(blank=True, null=True)),
                ('role', models.CharField(choices=[('user', 'User'), ('assistant', 'Assistant'), ('tool', 'Tool'), ('system', 'System')], max_length=16)),
                ('status', models.CharField(choices=[('waiting', 'Waiting'), ('pending', 'Pending'), ('completed', 'Completed'), ('partial', 'Partial'), ('discarded', 'Discarded'), ('superseded', 'Superseded'), ('rolled_back', 'Rolled Back')], default='completed', max_length=16)),
                ('position', models.BigIntegerField(blank=True, null=True)),
                ('content', models.JSONField(blank=True, default=list)),
                ('metadata', models.JSONField(blank=True, default=dict)),
                ('client_id', models.CharField(blank=True, default='', max_length=200)),
                ('shown', models.BooleanField(default=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('thread', models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.CASCADE, related_name='messages', to='longhaul_threads.thread')),
            ],
        ),
        migrations.CreateModel(
            name='IdempotencyKey',
            fields=[
                ('id', models.UUIDField(default=threads.ids.new_id, editable=False, primary_key=True, serialize=False)),
                ('key', models.CharField(max_length=200)),
                ('fingerprint', models.CharField(max_length=64)),
                ('status', models.SmallIntegerField(null=True)),
                ('answer', models.JSONField(null=True)),
                ('created_at', models.DateTimeField(db_default=threads.clock.Now(), editable=False)),
                ('owner', models.ForeignKey(null=True, on_delete=django.db.models.deletion.CASCADE, related_name='longhaul_idempotency_keys', to=settings.AUTH_USER_MODEL)),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('owner', 'key'), name='longhaul_one_answer_an_idempotency_key', nulls_distinct=False)],
            },
        ),
        migrations.AddIndex(
            model_name='thread',
            index=models.Index(fields=['owner', 'id'], name='longhaul_thread_of_owner'),
        ),
        migrations.AddIndex(
            model_name='message',
            index=models.Index(condition=models.Q(('run_id__isnull', False)), fields=['run_id', 'step'], name='longhaul_message_of_run'),
        ),
        migrations.AddIndex(
            model_name='message',
            index=models.Index(condition=models.Q(('position__isnull', True)), fields=['thread'], name='longhaul_message_waiting'),
        ),
        migrations.AddConstraint(
            model_name='message',
            constraint=models.UniqueConstraint(fields=('thread', 'position'), name='longhaul_one_message_a_position'),
        ),
        migrations.AddConstraint(
            model_name='message',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('position__isnull', True), ('status', 'waiting')), models.Q(('status', 'waiting'), _negated=True), _connector='OR'), name='longhaul_a_waiting_message_has_no_place'),
        ),
    ]
