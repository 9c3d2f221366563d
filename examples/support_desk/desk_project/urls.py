from django.urls import path

from desk import views

urlpatterns = [
    path("tickets/", views.open_ticket),
    path("tickets/<int:pk>/", views.show_ticket),
    path("tickets/<int:pk>/messages/", views.add_message),
    path("tickets/<int:pk>/stop/", views.stop),
    path("ask/", views.ask),
]
