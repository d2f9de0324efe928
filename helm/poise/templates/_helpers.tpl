{{/*
The name of every object: a DNS-1035 label, since KubeRay makes a Service of it. A release may begin with a digit and
have dots. 30 characters leave room for what KubeRay appends; a longer name keeps apart by the end of its digest.
*/}}
{{- define "poise.name" -}}
{{- $name := .Release.Name | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $name) }}{{ $name = printf "poise-%s" $name }}{{ end -}}
{{- if gt (len $name) 30 }}{{ $name = printf "%s-%s" (trunc 23 $name | trimAll "-") (sha256sum .Release.Name | trunc 6) }}{{ end -}}
{{- $name -}}
{{- end }}

{{/* Kueue admits a cluster as a whole, and refuses one that changes its size. */}}
{{- define "poise.queued" -}}
{{- if index .Values.labels "kueue.x-k8s.io/queue-name" }}true{{ end -}}
{{- end }}

{{- define "poise.autoscaled" -}}
{{- if and .Values.autoscaler.enabled (not (include "poise.queued" .)) }}true{{ end -}}
{{- end }}

{{/* The port of the S3 endpoint, where it has one of its own; nothing without an endpoint. */}}
{{- define "poise.s3.port" -}}
{{- with .Values.s3.endpoint -}}
{{- $url := urlParse . -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}
{{- end }}

{{- define "poise.serviceAccount" -}}
{{- $default := ternary (include "poise.name" .) "default" .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default $default -}}
{{- end }}

{{/* What selects the pods. Not app.kubernetes.io/name: KubeRay selects by its own value of it. */}}
{{- define "poise.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: poise
{{- end }}

{{- define "poise.labels" -}}
{{ include "poise.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "poise.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "poise.job.path" -}}
{{- .Values.job.path | default "/etc/poise/spec.yaml" -}}
{{- end }}

{{- define "poise.security.container" -}}
allowPrivilegeEscalation: false
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What every pod has, whatever runs in it. */}}
{{- define "poise.pod" -}}
serviceAccountName: {{ include "poise.serviceAccount" . | quote }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}
